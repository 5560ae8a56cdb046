"""What the gateway tells about itself: metrics, statistics, logs."""
