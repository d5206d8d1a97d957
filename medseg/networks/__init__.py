"""Networks: plan to torch module; layout and precision for the device."""
