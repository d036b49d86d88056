"""The page of the playground: one problem, solved before one's eyes by whatever the service is in front of."""
