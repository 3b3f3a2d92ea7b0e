"""Fine-tuning: one table of tasks, one loop, one set of metrics."""
