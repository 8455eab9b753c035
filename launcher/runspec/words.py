"""Words that people write into specs: right values by path, other tools' names for our keys, and what is meant by them."""

EXAMPLES: dict[str, str] = {
    "name": "gpt-125m-baseline",
    "workload": "{kind: gpt, layers: 12, width: 768, heads: 12, context: 1024}",
    "workload.layers": "12",
    "workload.width": "768",
    "workload.heads": "12",
    "workload.context": "1024",
    "workload.entrypoint": "my_train:main",
    "data.path": "./corpus",
    "train": "{tokens: 2.5e9, batch_tokens: 524288, lr: 6e-4}",
    "train.tokens": "2.5e9",
    "train.batch_tokens": "524288",
    "train.lr": "6e-4",
    "train.optimizer.betas": "[0.9, 0.95]",
    "eval.every_steps": "500",
    "cluster.nodes": "2, or {min: 1, max: 2}",
    "cluster.nodes.min": "1",
    "cluster.nodes.max": "2",
    "kubernetes.image": "registry.example.com/losscast:0.1",
    "monitor.url": "http://127.0.0.1:8700",
    "cluster.to": "local, ray://host:10001, http://host:8265 or kuberay",
}
"""What a right value looks like, by path."""

MEANT: dict[str, str] = {
    "learning_rate": "train.lr",
    "max_lr": "train.lr",
    "min_lr": "train.schedule.final_lr",
    "batch_size": "train.batch_tokens",
    "global_batch_size": "train.batch_tokens",
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "parallel.micro_batch",
    "micro_batch_size": "parallel.micro_batch",
    "max_tokens": "train.tokens",
    "steps": "train.tokens",
    "max_steps": "train.tokens",
    "num_steps": "train.tokens",
    "total_steps": "train.tokens",
    "epochs": "train.tokens",
    "num_epochs": "train.tokens",
    "num_train_epochs": "train.tokens",
    "total_tokens": "train.tokens",
    "warmup": "train.schedule.warmup_tokens",
    "warmup_steps": "train.schedule.warmup_tokens",
    "warmup_ratio": "train.schedule.warmup_tokens",
    "warmup_fraction": "train.schedule.warmup_tokens",
    "decay_steps": "train.schedule.decay_tokens",
    "weight_decay": "train.optimizer.weight_decay",
    "grad_clip": "train.optimizer.grad_clip",
    "gradient_clipping": "train.optimizer.grad_clip",
    "betas": "train.optimizer.betas",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "n_layer": "workload.layers",
    "n_layers": "workload.layers",
    "num_layers": "workload.layers",
    "d_model": "workload.width",
    "hidden_size": "workload.width",
    "n_embd": "workload.width",
    "n_head": "workload.heads",
    "num_heads": "workload.heads",
    "seq_len": "workload.context",
    "sequence_length": "workload.context",
    "block_size": "workload.context",
    "vocab_size": "workload.vocab",
    "model": "workload",
    "dataset": "data",
    "gpus": "cluster.gpus_per_node",
    "num_nodes": "cluster.nodes",
    "data_parallel": "parallel.dp",
    "pipeline_parallel": "parallel.pp",
    "tensor_parallel": "parallel.tp",
    "zero_stage": "parallel.zero",
    "fsdp": "parallel.zero",
    "gradient_accumulation_steps": "train.batch_tokens",
    "token": "monitor.token_env",
    "save_every": "checkpoints.every_steps",
    "save_steps": "checkpoints.every_steps",
    "checkpoint_dir": "checkpoints.url",
    "namespace": "kubernetes.namespace",
    "image": "kubernetes.image",
    "schedule": "train.schedule",
    "optimizer": "train.optimizer",
}
"""Other tools' words for our keys."""

_IN_TOKENS, _SEEN = ", in tokens: steps x batch_tokens", ", in tokens: passes x the corpus's tokens"
NOTES: dict[str, str] = {
    **dict.fromkeys(
        ("batch_size", "global_batch_size", "train_batch_size"), ", in tokens: sequences x context"
    ),
    **dict.fromkeys(("warmup_steps", "decay_steps", "warmup"), _IN_TOKENS),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "total_steps"), _IN_TOKENS),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), _SEEN),
    **dict.fromkeys(("warmup_ratio", "warmup_fraction"), ", in tokens: share x train.tokens"),
    "gradient_accumulation_steps": "; accumulation follows from it, micro_batch and dp",
    "token": ": the name of an environment variable, since specs are kept and shared",
    "fsdp": ": 3 shards parameters too",
}
"""What is to be known beside our key's name."""

SWITCHED_ON: dict[str, str] = {"parallel.offload": "cpu", "policy.pacer": "auto"}
"""What `true` most likely means for a key that has words of its own."""

FIRST: dict[str, str] = {
    "data": "path",
    "train.schedule": "kind",
    "eval": "every_steps",
    "parallel": "dp",
    "cluster": "to",
    "checkpoints": "url",
    "monitor": "url",
}
"""The key that a value is probably for which was written in place of a whole section."""
