"""What runs the project elsewhere: Modal, containers, blue/green releases."""
