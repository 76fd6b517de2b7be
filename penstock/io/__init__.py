"""Block engines: submit and poll reads and writes by address on a device."""
