"""The sending path: one `Publisher` for each topic, and the `Outlet` of all of them. On the publishing threads."""
