"""The hospital's no: a code and one sentence, a row of the ledger before it leaves. No torch: the executor says it as well."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from flwr.app import Error, Message

from fedmm.config import SiteConfig, load_site
from fedmm.errors import Refusal
from fedmm.privacy.ledger import Ledger

log = logging.getLogger("fedmm.client")


def refused(
    message: Message, error: Error, *, folder: Path | None, site: SiteConfig | None = None, said: str
) -> Message:
    """The answer to `message`. folder, site: the hospital's; None where there is no site.toml, so no ledger to write to.

    said: what of the sentence is the same each time, so that saying it again is no new row. A ledger that cannot be written
    stops no refusal, since the sentence is one of ours and tells nothing of a patient.
    """
    reply = Message(error, reply_to=message)
    if folder is None:
        return reply
    try:
        with Ledger.open(folder, site or load_site(folder)) as ledger:
            size, digest = len((error.reason or "").encode()), hashlib.sha256(said.encode()).hexdigest()
            ledger.record_sent(f"refusal {error.code}", run="", round=0, size=size, sha256=digest)
    except (Refusal, ValueError) as unwritten:
        log.error("the refusal that leaves is not in the ledger: %s", unwritten)
    return reply
