"""Which backend and form serve a call: `choice` decides, `machine` describes the device, `tune` measures, `explain`
prints why.
"""
