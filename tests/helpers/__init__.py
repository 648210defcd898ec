"""What the tests share: real processes, ports, two hosts in one machine, and a look at what a test left behind."""
