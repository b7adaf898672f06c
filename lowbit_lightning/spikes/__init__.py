"""What SpikeMonitor and SpikeGuard stand on: detecting, deciding, and bringing a run back."""
