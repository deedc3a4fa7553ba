-- A database for the app beside MLflow's, each of which only its own user can open. PostgreSQL's image runs this once,
-- when it makes an empty volume its own.
\set password `cat "${SECRETS:-/run/secrets}/stories_db_password"`
CREATE ROLE stories LOGIN PASSWORD :'password';
CREATE DATABASE stories OWNER stories;
REVOKE CONNECT, TEMPORARY ON DATABASE stories FROM PUBLIC;
REVOKE CONNECT, TEMPORARY ON DATABASE mlflow FROM PUBLIC;
