//! Training: configuration, objective, optimizer, schedule, the step, checkpoints, metrics.
