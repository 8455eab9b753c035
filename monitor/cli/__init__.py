"""The monitor's half of the `losscast` command: one module a command, each with `register(subparsers)`."""

MODULES = ("fit", "predict", "replay", "monitor", "alert", "watch", "runs", "mirror", "importing")
