"""Microcontrollers: C++ sources, memory and Arm's compiler for int8 ``.tflite`` files."""
