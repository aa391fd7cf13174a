"""Which responses belong together: samples and each role's responses, joined to groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from shared.config_data import FilterConfig
from shared.data.filters import Fault, fault
from shared.errors import DataError
from shared.types import Group, Response, Role, Sample

LISTED = 10


class Dropped(NamedTuple):
    """A group left out, and the response that is the reason."""

    sample_id: str
    draw: int
    role: Role
    reason: Fault


class Grouping(NamedTuple):
    """Groups in the order of the samples, and what was left out."""

    groups: list[Group]
    dropped: list[Dropped]

    def summary(self) -> str:
        """One line for the log: how many were left out, why, and the first ids."""
        total = len(self.groups) + len(self.dropped)
        if not self.dropped:
            return f"{total} groups, none left out"
        counts = Counter(f"{item.role} response {item.reason}" for item in self.dropped)
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.items()))
        ids = ", ".join(item.sample_id for item in self.dropped[:LISTED])
        more = ", ..." if len(self.dropped) > LISTED else ""
        return f"left out {len(self.dropped)} of {total} groups ({reasons}): {ids}{more}"


def make_groups(
    samples: Sequence[Sample],
    responses: Mapping[Role, Iterable[Response]],
    roles: Sequence[Role],
    *,
    truncated: Literal["keep", "drop"],
    filters: FilterConfig | None = None,
    longest: int | None = None,
) -> Grouping:
    """Join each sample with its responses, by id and draw: one group for each draw.

    A group with a response of no tokens is left out, since its mean over rows would be 0/0. Samples with the
    same text stay apart: only ids count. Responses to samples that are not given are ignored.

    Args:
        samples: In the order wanted.
        responses: Of at least the roles wanted.
        roles: Which responses a group holds, in this order.
        truncated: What becomes of groups with a response cut by the length limit.
        filters: Which further responses a group must not hold.
        longest: Tokens that a response may have; None: any number.

    Raises:
        DataError: a sample lacks a response, has two of the same draw, or every group is left out.
    """
    by_role = {role: _by_sample(role, responses.get(role, ())) for role in roles}
    grouping = Grouping([], [])
    missing: list[str] = []
    for sample in samples:
        found = {role: by_role[role].get(sample.id, {}) for role in roles}
        for draw in sorted(set().union(*found.values())) or [0]:
            lacking = [role for role in roles if draw not in found[role]]
            if lacking:
                missing.append(
                    f"sample {sample.id!r} ({sample.source}), draw {draw}: no {' or '.join(lacking)} response"
                )
                continue
            group = Group(sample, tuple(found[role][draw] for role in roles))
            faults = [
                (r, fault(r, truncated=truncated, filters=filters, longest=longest)) for r in group.responses
            ]
            dropped = next((Dropped(sample.id, draw, r.role, why) for r, why in faults if why), None)
            if dropped is None:
                grouping.groups.append(group)
            else:
                grouping.dropped.append(dropped)
    if missing:
        more = [f"... and {len(missing) - LISTED} more"] if len(missing) > LISTED else []
        raise DataError(
            "\n  ".join(
                [
                    f"{len(missing)} response(s) missing; generate them before training:",
                    *missing[:LISTED],
                    *more,
                ]
            )
        )
    if not grouping.groups:
        raise DataError(
            f"no group is left to use: {grouping.summary()}. Raise generation.max_new_tokens, keep truncated "
            "responses, loosen generation.filters, or check the models' answers."
        )
    return grouping


def pair_facts(groups: Sequence[Group]) -> dict[str, Any]:
    """What a round trains on, as JSON: how many groups, how long each role's responses are in the mean.

    With two responses to a group, `same` is the share of groups where both are the same tokens: there is
    nothing to contrast in these.
    """
    by_role = {response.role for response in groups[0].responses}
    tokens = {
        role: sum(len(r.token_ids) for group in groups for r in group.responses if r.role == role)
        for role in sorted(by_role)
    }
    same = None
    if len(by_role) == 2:
        same = sum(g.responses[0].token_ids == g.responses[1].token_ids for g in groups) / len(groups)
    return {
        "groups": len(groups),
        "mean_tokens": {role: count / len(groups) for role, count in tokens.items()},
        "same": same,
    }


def _by_sample(role: Role, responses: Iterable[Response]) -> dict[str, dict[int, Response]]:
    by_sample: dict[str, dict[int, Response]] = {}
    for response in responses:
        draws = by_sample.setdefault(response.sample_id, {})
        if response.draw in draws:
            raise DataError(
                f"two {role} responses for sample {response.sample_id!r}, draw {response.draw} (rounds "
                f"{draws[response.draw].round} and {response.round}). Give the responses of one round."
            )
        draws[response.draw] = response
    return by_sample
