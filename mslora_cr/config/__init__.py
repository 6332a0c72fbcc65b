from mslora_cr.earlier import moved

__getattr__ = moved("config")
