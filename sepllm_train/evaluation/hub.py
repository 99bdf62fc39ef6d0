"""The Hugging Face hub: asked once, and shortly, before libraries try it again and again."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from threading import Thread

# Longer than an answer takes, shorter than a user waits. A look-up of names alone may take the system minutes.
_SECONDS = 5.0


def offline_unless_reachable() -> None:
    """Set HF_HUB_OFFLINE, unless it is set, when the hub does not answer: only what is in its cache is used then.

    The libraries read it when they are imported.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    answered: list[bool] = []
    asking = Thread(target=_ask, args=(answered,), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    if not answered:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _ask(answered: list[bool]) -> None:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError):
        return
    answered.append(True)
