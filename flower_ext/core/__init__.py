"""What everything rests on: arrays, contributions, replies, samplers, errors."""
