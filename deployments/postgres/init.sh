#!/bin/sh
# Makes a database and its owner for Prefect and for MLflow. The image of PostgreSQL runs it once,
# when its data folder is new. Passwords come from the environment.
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
