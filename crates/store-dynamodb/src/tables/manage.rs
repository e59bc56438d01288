//! Creates the tables, and compares existing tables with their definition.

use std::{collections::BTreeMap, time::Duration};

use aws_sdk_dynamodb::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    operation::create_table::CreateTableError,
    types::{
        AttributeDefinition, BillingMode, GlobalSecondaryIndex, IndexStatus, KeySchemaElement,
        KeyType, PointInTimeRecoverySpecification, PointInTimeRecoveryStatus, ProjectionType,
        StreamSpecification, StreamViewType, TableDescription, TableStatus,
        TimeToLiveSpecification, TimeToLiveStatus,
    },
};
use tokio::time::{Instant, sleep};

use super::{Projection, TABLES, TIME_TO_LIVE, Table};
use crate::{
    DynamoOptions,
    client::sdk_config,
    error::{OpenError, error_chain},
};

/// Error code of an operation that a DynamoDB implementation for tests does not support.
const UNKNOWN_OPERATION: &str = "UnknownOperationException";
/// Maximum time to wait until a new table is active, which usually takes seconds.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
const POLL_INTERVAL: Duration = Duration::from_millis(300);

/// Difference between a table and its definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The table does not exist.
    Missing {
        /// Full name of the table.
        table: String,
    },
    /// The table exists, but differs from its definition.
    Other {
        /// Full name of the table.
        table: String,
        /// Description of the difference.
        what: String,
    },
}

impl std::fmt::Display for Difference {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { table } => write!(formatter, "{table}: does not exist"),
            Self::Other { table, what } => write!(formatter, "{table}: {what}"),
        }
    }
}

/// Creates the tables that do not exist and waits until they are active. Returns the names of the created tables, and
/// the differences between existing tables and their definition. Existing tables are not changed.
///
/// # Errors
/// Returns an error if a call to DynamoDB fails.
pub async fn create(options: &DynamoOptions) -> Result<(Vec<String>, Vec<Difference>), OpenError> {
    let client = Client::new(&sdk_config(options).await?);
    let mut created = Vec::new();
    let mut differences = Vec::new();
    for table in &TABLES {
        let name = format!("{}{}", options.table_prefix, table.name);
        match describe(&client, &name).await? {
            // Another process is creating the table.
            Some(found) if found.table_status() == Some(&TableStatus::Creating) => {
                await_active(&client, &name).await?;
            }
            Some(found) => differences.extend(compare(&client, table, &name, &found).await?),
            None => {
                create_table(&client, table, &name).await?;
                created.push(name);
            }
        }
    }
    // A failure for one table does not affect the other tables.
    let mut outcome = Ok(());
    for name in &created {
        let finished = match await_active(&client, name).await {
            Ok(()) => finish_table(&client, name).await,
            Err(error) => Err(error),
        };
        outcome = outcome.and(finished);
    }
    outcome?;
    Ok((created, differences))
}

/// Compares all tables with their definition.
///
/// # Errors
/// Returns an error if a call to DynamoDB fails.
pub async fn check(options: &DynamoOptions) -> Result<Vec<Difference>, OpenError> {
    let client = Client::new(&sdk_config(options).await?);
    let mut differences = Vec::new();
    for table in &TABLES {
        let name = format!("{}{}", options.table_prefix, table.name);
        match describe(&client, &name).await? {
            Some(found) => differences.extend(compare(&client, table, &name, &found).await?),
            None => differences.push(Difference::Missing { table: name }),
        }
    }
    Ok(differences)
}

fn table_error<E, R>(doing: &str, name: &str, error: &SdkError<E, R>) -> OpenError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let reason = match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => error_chain(error),
    };
    OpenError::Tables(format!("cannot {doing} table {name}: {reason}"))
}

async fn describe(client: &Client, name: &str) -> Result<Option<TableDescription>, OpenError> {
    match client.describe_table().table_name(name).send().await {
        Ok(found) => Ok(found.table),
        Err(error) => match error.as_service_error() {
            Some(service) if service.is_resource_not_found_exception() => Ok(None),
            _ => Err(table_error("describe", name, &error)),
        },
    }
}

async fn create_table(client: &Client, table: &Table, name: &str) -> Result<(), OpenError> {
    let mut create =
        client.create_table().table_name(name).billing_mode(BillingMode::PayPerRequest);
    for (attribute, kind) in table.key_attributes() {
        let definition =
            AttributeDefinition::builder().attribute_name(attribute).attribute_type(kind).build();
        create =
            create.attribute_definitions(definition.map_err(|e| OpenError::Tables(e.to_string()))?);
    }
    create = create.set_key_schema(Some(key_schema(table.key)?));
    for index in table.indexes {
        let (partition, sort, _) = index.key;
        let projection = aws_sdk_dynamodb::types::Projection::builder();
        let projection = match index.projection {
            Projection::KeysOnly => projection.projection_type(ProjectionType::KeysOnly),
            Projection::All => projection.projection_type(ProjectionType::All),
            Projection::Include(attributes) => {
                projection.projection_type(ProjectionType::Include).set_non_key_attributes(Some(
                    attributes.iter().map(|name| (*name).to_owned()).collect(),
                ))
            }
        };
        let index = GlobalSecondaryIndex::builder()
            .index_name(index.name)
            .set_key_schema(Some(key_schema(&[partition, sort])?))
            .projection(projection.build())
            .build();
        create =
            create.global_secondary_indexes(index.map_err(|e| OpenError::Tables(e.to_string()))?);
    }
    if table.stream {
        let stream = StreamSpecification::builder()
            .stream_enabled(true)
            .stream_view_type(StreamViewType::NewImage)
            .build();
        create = create.stream_specification(stream.map_err(|e| OpenError::Tables(e.to_string()))?);
    }
    match create.send().await {
        Ok(_) => Ok(()),
        // Another process is creating the table.
        Err(error)
            if error
                .as_service_error()
                .is_some_and(CreateTableError::is_resource_in_use_exception) =>
        {
            Ok(())
        }
        Err(error) => Err(table_error("create", name, &error)),
    }
}

fn key_schema(names: &[&str]) -> Result<Vec<KeySchemaElement>, OpenError> {
    let kinds = [KeyType::Hash, KeyType::Range];
    names
        .iter()
        .zip(kinds)
        .map(|(name, kind)| {
            let element = KeySchemaElement::builder().attribute_name(*name).key_type(kind).build();
            element.map_err(|error| OpenError::Tables(error.to_string()))
        })
        .collect()
}

async fn await_active(client: &Client, name: &str) -> Result<(), OpenError> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let status = describe(client, name).await?.and_then(|table| table.table_status);
        if status == Some(TableStatus::Active) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(OpenError::Tables(format!("table {name} did not become active in time")));
        }
        // DynamoDB has no call that waits until a table is active.
        sleep(POLL_INTERVAL).await;
    }
}

/// Sets the options that require an existing table. An implementation without backups is assumed to be for tests.
async fn finish_table(client: &Client, name: &str) -> Result<(), OpenError> {
    let spec = TimeToLiveSpecification::builder().enabled(true).attribute_name(TIME_TO_LIVE);
    let spec = spec.build().map_err(|error| OpenError::Tables(error.to_string()))?;
    let set = client.update_time_to_live().table_name(name).time_to_live_specification(spec);
    if let Err(error) = set.send().await {
        // Another process that creates the table may already have set it.
        if !has_time_to_live(client, name).await? {
            return Err(table_error("set the time to live of", name, &error));
        }
    }
    let spec = PointInTimeRecoverySpecification::builder().point_in_time_recovery_enabled(true);
    let spec = spec.build().map_err(|error| OpenError::Tables(error.to_string()))?;
    let set = client
        .update_continuous_backups()
        .table_name(name)
        .point_in_time_recovery_specification(spec);
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        match set.clone().send().await {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(UNKNOWN_OPERATION) => {
                tracing::warn!(
                    table = name,
                    "this DynamoDB implementation has no point-in-time recovery"
                );
                return Ok(());
            }
            // The backups of a new table are not yet enabled.
            Err(error)
                if error.code() == Some("ContinuousBackupsUnavailableException")
                    && Instant::now() < deadline =>
            {
                sleep(POLL_INTERVAL).await;
            }
            Err(error) => return Err(table_error("set point-in-time recovery of", name, &error)),
        }
    }
}

/// Returns whether point-in-time recovery is enabled; `None` if the implementation does not support it.
async fn has_recovery(client: &Client, name: &str) -> Result<Option<bool>, OpenError> {
    let found = match client.describe_continuous_backups().table_name(name).send().await {
        Ok(found) => found,
        Err(error) if error.code() == Some(UNKNOWN_OPERATION) => return Ok(None),
        Err(error) => return Err(table_error("describe the backups of", name, &error)),
    };
    let status = found
        .continuous_backups_description
        .and_then(|backups| backups.point_in_time_recovery_description)
        .and_then(|recovery| recovery.point_in_time_recovery_status);
    Ok(Some(status == Some(PointInTimeRecoveryStatus::Enabled)))
}

async fn has_time_to_live(client: &Client, name: &str) -> Result<bool, OpenError> {
    let found = client.describe_time_to_live().table_name(name).send().await;
    let found = found.map_err(|error| table_error("describe the time to live of", name, &error))?;
    let Some(found) = found.time_to_live_description else { return Ok(false) };
    let enabled = matches!(
        found.time_to_live_status,
        Some(TimeToLiveStatus::Enabled | TimeToLiveStatus::Enabling)
    );
    Ok(enabled && found.attribute_name.as_deref() == Some(TIME_TO_LIVE))
}

async fn compare(
    client: &Client,
    table: &Table,
    name: &str,
    found: &TableDescription,
) -> Result<Vec<Difference>, OpenError> {
    let mut differences = Vec::new();
    let mut report = |what: String| {
        differences.push(Difference::Other { table: name.to_owned(), what });
    };
    let keys = key_names(found.key_schema());
    if keys != table.key {
        report(format!("its key is {}, should be {}", keys.join(" + "), table.key.join(" + ")));
    }
    let found_indexes: BTreeMap<_, _> = found
        .global_secondary_indexes()
        .iter()
        .filter(|index| index.index_status() != Some(&IndexStatus::Deleting))
        .filter_map(|index| Some((index.index_name()?, index)))
        .collect();
    let types: BTreeMap<_, _> = found
        .attribute_definitions()
        .iter()
        .map(|definition| (definition.attribute_name(), definition.attribute_type()))
        .collect();
    for (attribute, kind) in table.key_attributes() {
        if let Some(found) = types.get(attribute).filter(|found| **found != &kind) {
            report(format!("key {attribute} has type {found}, should be {kind}"));
        }
    }
    for index in table.indexes {
        let Some(found) = found_indexes.get(index.name) else {
            report(format!("index {} does not exist", index.name));
            continue;
        };
        let (partition, sort, _) = index.key;
        let keys = key_names(found.key_schema());
        if keys != [partition, sort] {
            let keys = keys.join(" + ");
            report(format!("index {} has key {keys}, should be {partition} + {sort}", index.name));
        }
        let projection = found.projection();
        let kind = projection.and_then(|projection| projection.projection_type());
        let mut included: Vec<_> = projection
            .map(|projection| projection.non_key_attributes().to_vec())
            .unwrap_or_default();
        included.sort();
        let is_expected = match index.projection {
            Projection::KeysOnly => kind == Some(&ProjectionType::KeysOnly),
            Projection::All => kind == Some(&ProjectionType::All),
            Projection::Include(expected_attributes) => {
                let mut expected_attributes = expected_attributes.to_vec();
                expected_attributes.sort_unstable();
                kind == Some(&ProjectionType::Include) && included == expected_attributes
            }
        };
        if !is_expected {
            let found = kind.map_or("nothing", ProjectionType::as_str);
            report(format!(
                "index {} projects {found} {included:?}, should be {:?}",
                index.name, index.projection
            ));
        }
    }
    let stream = found.stream_specification().filter(|stream| stream.stream_enabled());
    let view = stream.and_then(|stream| stream.stream_view_type());
    if table.stream
        && !matches!(view, Some(StreamViewType::NewImage | StreamViewType::NewAndOldImages))
    {
        let view = view.map_or("none", StreamViewType::as_str);
        report(format!("its stream is {view}, should be NEW_IMAGE"));
    }
    if !has_time_to_live(client, name).await? {
        differences.push(Difference::Other {
            table: name.to_owned(),
            what: format!("time to live is not enabled on attribute {TIME_TO_LIVE}"),
        });
    }
    if has_recovery(client, name).await? == Some(false) {
        differences.push(Difference::Other {
            table: name.to_owned(),
            what: "it has no point-in-time recovery".to_owned(),
        });
    }
    Ok(differences)
}

/// Returns the names of the key attributes, partition key first.
fn key_names(schema: &[KeySchemaElement]) -> Vec<&str> {
    let mut elements: Vec<_> = schema.iter().collect();
    elements.sort_by_key(|element| element.key_type() != &KeyType::Hash);
    elements.into_iter().map(KeySchemaElement::attribute_name).collect()
}
