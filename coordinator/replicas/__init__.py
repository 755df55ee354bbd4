"""Several coordinators over one database, as one: what the database is too slow for goes from replica to replica."""
