#!/bin/sh
# A database with an owner of its own for Prefect and for MLflow; run once, by the image of
# PostgreSQL, when its data folder is new. Passwords come from the environment.
set -eu

for name in prefect mlflow; do
  case $name in
    prefect) password=$PREFECT_DATABASE_PASSWORD ;;
    mlflow) password=$MLFLOW_DATABASE_PASSWORD ;;
  esac
  psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set name="$name" --set password="$password" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
done
