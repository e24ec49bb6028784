"""The server on Ray Serve: `serve run pard_onnx.serve.ray:app target=DIR draft=DIR max_replicas=4`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .arguments import Arguments

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["app"]

# Requests of a conversation go to the replica that its key names, and to the next one where that one is full
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
INGRESS_REQUESTS = 1000  # that an ingress has at the same time; it does nothing but forward
INGRESS_LAST = 10.0  # seconds that an ingress waits longer than the models it forwards for


def app(arguments: Mapping[str, object]) -> Application:
    """The application. Ray calls it with the arguments of `serve run`, or with `args` of a configuration file.

    Raises BadInput, which names the argument.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from .ingress import Ingress
    from .model_server import ModelServer

    given = Arguments.read(arguments, os.environ)
    models = serve.deployment(
        name=ModelServer.__name__,
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
        max_ongoing_requests=given.most_ongoing,
        max_queued_requests=given.max_queue,
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": given.target_ongoing_requests or given.max_live,
            "upscale_delay_s": given.upscale_delay_s,
            "downscale_delay_s": given.downscale_delay_s,
        },
        graceful_shutdown_timeout_s=given.grace,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )(ModelServer)
    ingress = serve.deployment(
        name=Ingress.__name__,
        num_replicas=given.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=given.grace + INGRESS_LAST,
    )(serve.ingress()(Ingress))
    return ingress.bind(models.bind(given), given)
