"""What to say where the hub gives nothing, without its libraries' half a minute of retries if there is no network."""

import functools
import os
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 5  # for the hub to answer


def no_hub(name: str) -> str:
    """Why `name` can come from the cache only: it is no path here, and the hub cannot be reached, or the user has set
    HF_HUB_OFFLINE. Else an empty text.

    Where that is so, the hub's libraries are told to use their cache and not to try the network again and again.
    """
    if Path(name).exists():
        return ""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        return "it is not here, HF_HUB_OFFLINE is set, and the hub's cache here lacks it"
    if reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        return ""
    constants.HF_HUB_OFFLINE = True
    return "it is not here, the hub cannot be reached, and the hub's cache here lacks it"


@functools.cache
def reachable(address: str) -> bool:
    """Whether anything answers there; once asked."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:  # an answer too
        return True
    except OSError as error:
        reason = getattr(error, "reason", error)
        return "certificate" in str(reason).lower()  # it is there; whom it is trusted by is settled elsewhere
    return True


def in_a_line(error: Exception) -> str:
    """All of a library's message, which may go over several lines."""
    return " ".join(str(error).split())


def short(error: Exception) -> str:
    """The first line of a library's message, or all of it if that line only begins a list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
