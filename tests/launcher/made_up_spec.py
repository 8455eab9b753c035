"""A run.yaml that is quickly read: format it with `url`, where its runs lie."""

SPEC = """
name: here
workload: {{kind: gpt, layers: 1, width: 16, heads: 1, context: 32}}
data: {{path: stdlib}}
train: {{tokens: 1e5, batch_tokens: 256, lr: 1e-3, schedule: {{kind: constant}}}}
checkpoints: {{url: "{url}"}}
"""
