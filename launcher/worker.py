"""One rank under torchrun, without Ray: `torchrun --nproc-per-node 2 -m launcher.worker run.yaml`."""

from launcher.training.ending import end_with


def main() -> int:
    """Train as the arguments say; the exit status."""
    from launcher.training.loop import main as train  # torch loads here, after the process knows how it ends

    return train()


if __name__ == "__main__":
    end_with(main)
