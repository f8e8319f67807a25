"""An exported folder on the Hugging Face hub."""

import os
from pathlib import Path

import huggingface_hub as hub

from data_prep.errors import UserError
from pipeline.redact import REDACTED, failure_message


def check_repository(repository: str) -> None:
    """Raises UserError where it is no name of a repository, or nobody is logged in: before an export is written."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    problems = []
    try:
        validate_repo_id(repository)
    except HFValidationError:
        problems.append(f"--push-to-hub {repository}: is no name of a repository; write USER/NAME")
    if hub.get_token() is None:
        problems.append("--push-to-hub: nobody is logged in to the hub; set HF_TOKEN, or run `hf auth login`")
    if problems:
        raise UserError(problems)


def push(folder: Path, repository: str) -> str:
    """Upload all files in one commit, into a repository that is made, private, where there is none.

    Returns:
        Its address.

    Raises:
        UserError: the hub cannot be reached, or refuses; without the token.
    """
    hub.utils.disable_progress_bars()
    try:
        api = hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of GlobalLocal")
    except Exception as error:  # of several libraries
        said = failure_message(error)
        for secret in (hub.get_token(), os.environ.get("HF_TOKEN")):
            said = said.replace(secret, REDACTED) if secret else said
        raise UserError(f"--push-to-hub {repository}: {said}; the export itself stands in {folder}") from None
    return f"{hub.constants.ENDPOINT}/{repository}"
