"""Find a model's language-specific functional heads and steer them; every module can be used from a notebook.

`soteria.load_steered` is exported here; importing the package does not import torch.
"""

__version__ = "1.0.0"


def __getattr__(name: str):
    if name == "load_steered":
        from soteria.steering.delta import load_steered

        return load_steered
    raise AttributeError(f"module 'soteria' has no attribute {name!r}")
