"""Language-specific functional heads and the steering of them; every module can be used from a notebook.

`soteria.load_steered` is at hand here; torch is loaded only when it is asked for.
"""

__version__ = "1.0.0"


def __getattr__(name: str):
    if name == "load_steered":
        from soteria.steering.delta import load_steered

        return load_steered
    raise AttributeError(f"module 'soteria' has no attribute {name!r}")
