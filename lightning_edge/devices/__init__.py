"""Machines that files are run on: this one, a Linux board by SSH, an Android phone by adb, an emulated ARM64."""

from lightning_edge.devices.adb import Adb
from lightning_edge.devices.core_ml import CoreML
from lightning_edge.devices.device import Channel, Device, Farewell
from lightning_edge.devices.emulated import Emulated
from lightning_edge.devices.local import Local
from lightning_edge.devices.ssh import Ssh

__all__ = ["Adb", "Channel", "CoreML", "Device", "Emulated", "Farewell", "Local", "Ssh"]
