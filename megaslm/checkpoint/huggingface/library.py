"""The one door to the transformers library, for whoever compares with it."""

from types import ModuleType

from megaslm.parallel import quiet_torchao


def load_transformers() -> ModuleType:
    """The library, which takes seconds to import and brings torchao with its models, where that is installed.

    Raises ImportError where transformers is not installed.
    """
    quiet_torchao()
    import transformers

    return transformers
