from mslora_cr.cli.main import main

__all__ = ["main"]
