"""The Azure infrastructure of a training cluster, as a Pulumi program. Importing this package imports no Pulumi.

pip install 'losscast[pulumi]'; cd infra/azure; pulumi up      (docs/azure.md has every command)
"""
