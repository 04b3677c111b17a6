"""Upload of an export to the Hugging Face hub."""

from pathlib import Path

from megaslm.errors import UserError


def sign_in(name: str) -> None:
    """See that an upload to the repository `name` can begin: before hours of work, not after them.

    Raises:
        UserError: no such name can be, nobody is signed in, or the hub can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        HfApi().whoami()
    except Exception as error:  # a class for each of: no token, a wrong one, no network
        raise UserError(
            f"can't upload to {name}: {_first_line(error)}; sign in with `hf auth login`, or leave --push_to_hub out"
        ) from None


def push_export(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload a folder as the repository `name`, which is made if it is not there.

    Returns:
        Its address.

    Raises:
        UserError: the hub refused it, or can't be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of megaslm")
    except Exception as error:
        raise UserError(
            f"the upload to {name} failed: {_first_line(error)}; the export is in {folder}, and "
            f"`hf upload {name} {folder}` uploads it"
        ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
