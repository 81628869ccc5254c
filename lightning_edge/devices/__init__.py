"""Machines that files are run on: what a device is, this machine, a Linux board by SSH, an Android phone by adb."""

from lightning_edge.devices.adb import Adb
from lightning_edge.devices.device import Channel, Device, Farewell
from lightning_edge.devices.local import Local
from lightning_edge.devices.ssh import Ssh

__all__ = ["Adb", "Channel", "Device", "Farewell", "Local", "Ssh"]
