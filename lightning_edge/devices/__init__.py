"""Machines that files are run on: what a device is, this machine, and any Linux board by SSH."""

from lightning_edge.devices.device import Channel, Device, Farewell
from lightning_edge.devices.local import Local
from lightning_edge.devices.ssh import Ssh

__all__ = ["Channel", "Device", "Farewell", "Local", "Ssh"]
