"""What the scripts beside this file ask MLflow about its databases. Reads MLFLOW_BACKEND_STORE_URI and AUTH_DATABASE_URI.

state [SUFFIX]  prints, for the tracking and the auth database (their names with SUFFIX): empty | current | old REVISION |
                newer REVISION
counts          prints the number of runs and of registered models
admin NAME      sets the administrator's password to the first line of what is open as descriptor 3
create HOST     makes the user mlflow and both databases on a server of PostgreSQL, as its user postgres; what is there stays.
                Their passwords: SECRETS/database and SECRETS/master (SECRETS: /run/secrets)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def state(url: str, version_table: str, migrations: Path) -> str:
    """Where the database stands against the migrations that this MLflow has."""
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        tables = set(sqlalchemy.inspect(connection).get_table_names())
        revision = MigrationContext.configure(connection, opts={"version_table": version_table}).get_current_revision()
    engine.dispose()
    if not {name for name in tables if not name.startswith("alembic_")}:
        return "empty"
    scripts = ScriptDirectory(str(migrations))
    if revision is None:
        return "old none"
    if revision in scripts.get_heads():
        return "current"
    try:
        scripts.get_revision(revision)
    except CommandError:
        return f"newer {revision}"
    return f"old {revision}"


def states(suffix: str) -> list[str]:
    """Of the tracking and the auth database, each with `suffix` after its name."""
    import mlflow

    package = Path(mlflow.__file__).parent
    return [
        state(os.environ["MLFLOW_BACKEND_STORE_URI"] + suffix, "alembic_version", package / "store/db_migrations"),
        state(os.environ["AUTH_DATABASE_URI"] + suffix, "alembic_version_auth", package / "server/auth/db/migrations"),
    ]


def counts() -> tuple[int, int]:
    """(runs, registered models), 0 where there are no tables yet."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(os.environ["MLFLOW_BACKEND_STORE_URI"])
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(connection).get_table_names()

        def count(table: str) -> int:
            query = sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table(table))
            return int(connection.execute(query).scalar_one()) if table in tables else 0

        return count("runs"), count("registered_models")


def set_admin_password(name: str, password: str) -> None:
    """Makes the user an administrator with this password, whatever the database knew of it."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore()
    store.init_db(os.environ["AUTH_DATABASE_URI"])
    if store.has_user(name):
        store.update_user(name, password=password, is_admin=True)
    else:
        store.create_user(name, password, is_admin=True)


def create(host: str, password: str, master: str) -> None:
    """The user `mlflow` with this password, who owns the databases `mlflow` and `mlflow_auth`. `host`: HOST or HOST:PORT."""
    import psycopg2
    from psycopg2 import sql

    name, _, port = host.partition(":")
    connection = psycopg2.connect(host=name, port=port or 5432, user="postgres", password=master, dbname="postgres")
    connection.autocommit = True  # CREATE DATABASE refuses a transaction
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = 'mlflow'")
        verb = "ALTER" if cursor.fetchone() else "CREATE"
        cursor.execute(sql.SQL(verb + " ROLE mlflow LOGIN PASSWORD {}").format(sql.Literal(password)))
        # A managed server's `postgres` is no superuser: it may give away databases to roles that it belongs to.
        cursor.execute("GRANT mlflow TO CURRENT_USER")
        for database in ("mlflow", "mlflow_auth"):
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE DATABASE {} OWNER mlflow").format(sql.Identifier(database)))
    connection.close()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "state":
        print("\n".join(states(*arguments or [""])))
    elif command == "counts":
        print(*counts())
    elif command == "admin":
        with os.fdopen(3) as secret:
            set_admin_password(arguments[0], secret.readline().strip())
    elif command == "create":
        secrets = Path(os.environ.get("SECRETS", "/run/secrets"))
        create(arguments[0], (secrets / "database").read_text().strip(), (secrets / "master").read_text().strip())
    else:
        sys.exit(f"database.py: no command {command}")
