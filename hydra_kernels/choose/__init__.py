"""Which backend and form serve a call: `choice` decides, `machine` knows devices, `tune` measures, `explain` tells."""
