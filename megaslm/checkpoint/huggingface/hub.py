"""Upload of an export to the Hugging Face hub."""

from pathlib import Path

from megaslm.checkpoint.huggingface.folder import INDEX, SINGLE
from megaslm.data import TOKENIZER_FILES
from megaslm.errors import UserError, first_line

# Of an older export in the repository, what must not stand beside the new one: transformers opens model.safetensors
# before an index, and any tokenizer file that it finds.
REPLACED = (SINGLE, INDEX, "model-?????-of-?????.safetensors", *TOKENIZER_FILES)


def sign_in(name: str, private: bool = False) -> str:
    """See that an upload to the repository `name` can begin: before hours of work, not after them.

    Args:
        private: whether nobody else may see it.

    Returns:
        The repository's whole name: OWNER/NAME.

    Raises:
        UserError: no such name can be, nobody is signed in, the hub can't be reached, or the repository is there for
            everyone to see and should be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    try:
        validate_repo_id(name)
        user = api.whoami()["name"]
        name = name if "/" in name else f"{user}/{name}"
        try:
            public = not api.repo_info(name).private
        except RepositoryNotFoundError:
            public = False
    except Exception as error:  # a class for each of: no token, a wrong one, no network
        raise UserError(
            f"can't upload to {name}: {first_line(error, type(error).__name__)}; sign in with `hf auth login`, or "
            "leave --push_to_hub out"
        ) from None
    if private and public:
        raise UserError(
            f"{name} is there and public, and --private would not change that: make it private in its settings, or "
            "choose another name"
        )
    return name


def push_export(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload a folder as the repository `name`, which is made if it is not there. An older export there is replaced.

    Args:
        name: OWNER/NAME, see `sign_in`.

    Returns:
        Its address.

    Raises:
        UserError: the hub refused it, or can't be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Export of megaslm",
            delete_patterns=list(REPLACED),  # those that are uploaded anew are not deleted
        )
    except Exception as error:
        deleted = " ".join(f"--delete '{pattern}'" for pattern in REPLACED[:3])
        raise UserError(
            f"the upload to {name} failed: {first_line(error, type(error).__name__)}; the export is in {folder}, and "
            f"`hf upload {name} {folder} . {deleted}` uploads it"
        ) from None
    return str(address)
