"""Make checkpoints: plan, calibrate, train, measure, build."""
