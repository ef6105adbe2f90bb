"""The hospital daemon: intake, a durable queue, workers, delivery. Nothing that was acknowledged is lost."""
