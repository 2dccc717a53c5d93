"""Requests to the Hub: what it or the line to it says against one, as an error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outlierq.core.errors import SourceError

# Seconds that a busy Hub may ask to wait before it is asked again.
LONGEST_WAIT = 300

OFFLINE_HINT = "use a local folder, or fetch the model once with a network and run with HF_HUB_OFFLINE=1"


@contextmanager
def asking(repository: str, revision: str | None = None, hint: str = OFFLINE_HINT) -> Iterator[None]:
    """What the Hub or the line to it says against a request, as a SourceError. hint: for a line that breaks."""
    from huggingface_hub import errors

    _bound_waits()
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: its owner must grant you access first",
            hint=f"ask at https://huggingface.co/{repository}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{repository} has no revision {revision}", hint="give a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repository} is neither a path here nor a repository that you may read on the Hub",
            hint="check the spelling; for a private repository log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repository} is not in the cache and the Hub cannot be reached", hint=OFFLINE_HINT
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceError(
            f"HF_HUB_OFFLINE is set, so nothing of {repository} can be asked of the Hub", hint="unset it"
        ) from error
    except errors.HFValidationError as error:
        raise SourceError(f"{repository} is no valid Hub id: {error}", hint="a Hub id is written owner/name") from error
    except (errors.HTTPError, OSError) as error:
        raise SourceError(f"{repository} could not be fetched from the Hub: {error}", hint=hint) from error
    except ValueError as error:  # no JSON: a page to log in to a network, for example
        raise SourceError(
            f"what answered for {repository} is not the Hub: {error}",
            hint="log in to this network first (or look at HF_ENDPOINT and the proxy), and run the same command again",
        ) from error


def _bound_waits() -> None:
    """Let requests to the Hub fail when it asks for a long wait: huggingface_hub would wait a day, five times."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    """SourceError when the Hub takes no more requests, and will not for long. response: of the HTTP client."""
    if response.status_code != 429:
        return
    said = [response.headers.get("retry-after", ""), *re.findall(r"\bt=(\d+)", response.headers.get("ratelimit", ""))]
    seconds = max((int(text) for text in said if text.isdecimal()), default=0)
    if seconds > LONGEST_WAIT:
        raise SourceError(
            f"the Hub takes no more requests from here for {seconds:,} seconds (429, too many requests)",
            hint="log in with `hf auth login` or set HF_TOKEN, which allows more; or run the same command again later",
        )
