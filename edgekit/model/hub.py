"""Models of the Hugging Face Hub, by id: fetched into the Hub client's own cache, never with pickled weights."""

from __future__ import annotations

from pathlib import Path

from edgekit.checkpoint import INDEX, TOKENIZER_FILES
from edgekit.errors import UserError

PATTERNS = ("config.json", "model*.safetensors", INDEX, *TOKENIZER_FILES, "README.md")


def fetch(repo: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """The folder of a model repository at a revision (branch, tag or commit; None: the default branch).

    Only `PATTERNS` are fetched. `offline` reads the cache alone, as HF_HUB_OFFLINE=1 does. Tokens, mirrors and the
    cache's place are those of the Hub client's environment.

    Raises UserError: no such repository or revision, no access to it, or neither a network nor a cached copy.
    """
    import huggingface_hub  # it loads an HTTP client: only who fetches waits for that
    from huggingface_hub import errors

    spec = repo if revision is None else f"{repo}@{revision}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(PATTERNS), local_files_only=offline
        )
    except errors.GatedRepoError as problem:
        raise UserError(f"{spec} is gated: accept its terms on its page, then `hf auth login`") from problem
    except errors.RepositoryNotFoundError as problem:
        raise UserError(
            f"the Hub has no model {repo}, or it is private; check the name, or `hf auth login` if it is yours"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise UserError(f"{repo} has no revision {revision}; name a branch, tag or commit of it") from problem
    except errors.HFValidationError as problem:
        raise UserError(f"a Hub id must be owner/name[@revision]: got {spec!r}") from problem
    except errors.LocalEntryNotFoundError as problem:
        reason = "fetching is off (offline)" if offline else "the Hub cannot be reached"
        raise UserError(
            f"{spec} is not whole in the Hub client's cache, and {reason}; connect once, or pass a local folder"
        ) from problem
    except Exception as problem:  # the client lets its HTTP library's errors through, and has changed libraries
        raise UserError(
            f"fetching {spec} failed: {type(problem).__name__}: {_first_line(problem)};"
            " try again, or pass a local folder"
        ) from problem
    return Path(folder)


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or ["no reason given"])[0]
