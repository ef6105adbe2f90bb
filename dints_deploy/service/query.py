"""Ask the sender of a study how many instances it has (C-FIND), where the configuration says where to ask."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from dints_deploy.config.intake import Completeness, Query
from dints_deploy.config.tls import client_context
from dints_deploy.dicom.network import Remote, count_instances
from dints_deploy.errors import DintsError

LOGGER: Final = logging.getLogger(__name__)


def ask_sender(rules: Completeness, calling: Sequence[str], study: str) -> dict[str, int]:
    """Return SeriesInstanceUID -> number of instances; nothing where no sender knows or answers.

    Args:
        rules: which senders can be asked.
        calling: AE titles that sent the study.
        study: its StudyInstanceUID.
    """
    counts: dict[str, int] = {}
    for query in rules.queries:
        if query.sender not in calling:
            continue
        try:
            counts |= count_instances(remote_of_query(query), study)
        except DintsError as error:
            LOGGER.warning("a sender could not be asked", extra={"action": "query_failed", "code": error.code})
    return counts


def remote_of_query(query: Query) -> Remote:
    """Return the node that a query asks."""
    return Remote(
        host=query.host,
        port=query.port,
        ae_title=query.ae_title,
        calling_ae_title=query.calling_ae_title,
        timeout_seconds=query.timeout_seconds,
        tls=None if query.tls is None else client_context(query.tls),
    )
