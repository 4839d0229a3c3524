"""What a damaged run still has: `verify` finds the damage, `salvage` saves what is sound."""
