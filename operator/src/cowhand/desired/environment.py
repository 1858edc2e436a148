"""Environment of a sandbox with the chart's defaults filled in.

Called when a session is frozen, so that a later upgrade of the chart does not change the sandboxes of
sessions that run, and for Sandboxes that are applied by hand.
"""

from __future__ import annotations

from cowhand.api.v1alpha1 import ComputeResources, EnvironmentSpec


def resolve(
    wanted: EnvironmentSpec | None, default: EnvironmentSpec, sandbox_image: str
) -> EnvironmentSpec:
    """The environment to use: what is wanted, else the chart's, with image and resources set.

    Args:
        wanted: what the user wrote; None takes the default as a whole.
        default: the chart's default environment; its image and resources also fill gaps of `wanted`.
        sandbox_image: image where neither names one.
    """
    base = wanted if wanted is not None else default
    theirs = base.resources or ComputeResources()
    ours = default.resources or ComputeResources()
    resources = ComputeResources(
        cpu=theirs.cpu or ours.cpu,
        memory=theirs.memory or ours.memory,
        ephemeral_storage=theirs.ephemeral_storage or ours.ephemeral_storage,
    )
    return base.model_copy(
        update={
            "image": base.image or default.image or sandbox_image,
            "resources": resources if resources != ComputeResources() else None,
        }
    )
