"""Load tests (`load`), benchmarks (`bench`) and a simulation of autoscaling (`simulation`)."""
