"""The operator process: kopf handlers, keyed queue, leader election and wiring; the only importer of `kopf`."""
