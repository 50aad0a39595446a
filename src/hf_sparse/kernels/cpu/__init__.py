"""The native core: tiles of kept values, decoded and multiplied by the processor's vectors."""
