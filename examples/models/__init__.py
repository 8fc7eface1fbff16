"""Compact models, each readable in one sitting."""
