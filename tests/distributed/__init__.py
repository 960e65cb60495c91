"""Many processes on one machine: groups of workers (`group`, `worker`), and what they run."""
