from dpdiff.cli.app import main

__all__ = ["main"]
