//! Creating the tables, and comparing what is there with what should be.

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
    error::{OpenError, chain},
};

/// Code of what an implementation for tests does not have.
const NO_SUCH_OPERATION: &str = "UnknownOperationException";
/// A new table takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_AGAIN: Duration = Duration::from_millis(300);

/// How a table differs from what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It is not there.
    Missing {
        /// Full name of the table.
        table: String,
    },
    /// It is there, and not as it should be.
    Other {
        /// Full name of the table.
        table: String,
        /// What.
        what: String,
    },
}

impl std::fmt::Display for Difference {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { table } => write!(formatter, "{table}: is not there"),
            Self::Other { table, what } => write!(formatter, "{table}: {what}"),
        }
    }
}

/// Creates the tables that are not there and waits until they can be used; returns their names, and
/// how those that were there differ from what they should be. Those are not changed.
///
/// # Errors
/// When DynamoDB cannot be asked or refuses.
pub async fn create(options: &DynamoOptions) -> Result<(Vec<String>, Vec<Difference>), OpenError> {
    let client = Client::new(&sdk_config(options).await?);
    let mut created = Vec::new();
    let mut differences = Vec::new();
    for table in &TABLES {
        let name = format!("{}{}", options.table_prefix, table.name);
        match describe(&client, &name).await? {
            // Somebody else creates it at this moment.
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
    // What fails for one table is done for the others all the same.
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

/// Compares all tables with what they should be.
///
/// # Errors
/// When DynamoDB cannot be asked.
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

fn failed<E, R>(doing: &str, name: &str, error: &SdkError<E, R>) -> OpenError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let reason = match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => chain(error),
    };
    OpenError::Tables(format!("cannot {doing} table {name}: {reason}"))
}

async fn describe(client: &Client, name: &str) -> Result<Option<TableDescription>, OpenError> {
    match client.describe_table().table_name(name).send().await {
        Ok(found) => Ok(found.table),
        Err(error) => match error.as_service_error() {
            Some(service) if service.is_resource_not_found_exception() => Ok(None),
            _ => Err(failed("describe", name, &error)),
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
        // Somebody else creates it at this moment.
        Err(error)
            if error
                .as_service_error()
                .is_some_and(CreateTableError::is_resource_in_use_exception) =>
        {
            Ok(())
        }
        Err(error) => Err(failed("create", name, &error)),
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
    let until = Instant::now() + PATIENCE;
    loop {
        let status = describe(client, name).await?.and_then(|table| table.table_status);
        if status == Some(TableStatus::Active) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(OpenError::Tables(format!("table {name} does not become active")));
        }
        // DynamoDB has no call that waits for this.
        sleep(LOOK_AGAIN).await;
    }
}

/// What can be set only once the table is there. An implementation that does not know backups is
/// one for tests.
async fn finish_table(client: &Client, name: &str) -> Result<(), OpenError> {
    let spec = TimeToLiveSpecification::builder().enabled(true).attribute_name(TIME_TO_LIVE);
    let spec = spec.build().map_err(|error| OpenError::Tables(error.to_string()))?;
    let set = client.update_time_to_live().table_name(name).time_to_live_specification(spec);
    if let Err(error) = set.send().await {
        // It may be set already, by whoever created the table at the same time.
        if !has_time_to_live(client, name).await? {
            return Err(failed("set the time to live of", name, &error));
        }
    }
    let spec = PointInTimeRecoverySpecification::builder().point_in_time_recovery_enabled(true);
    let spec = spec.build().map_err(|error| OpenError::Tables(error.to_string()))?;
    let set = client
        .update_continuous_backups()
        .table_name(name)
        .point_in_time_recovery_specification(spec);
    let until = Instant::now() + PATIENCE;
    loop {
        match set.clone().send().await {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(NO_SUCH_OPERATION) => {
                tracing::warn!(table = name, "this DynamoDB has no point-in-time recovery");
                return Ok(());
            }
            // A new table's backups are about to be enabled.
            Err(error)
                if error.code() == Some("ContinuousBackupsUnavailableException")
                    && Instant::now() < until =>
            {
                sleep(LOOK_AGAIN).await;
            }
            Err(error) => return Err(failed("set point-in-time recovery of", name, &error)),
        }
    }
}

/// `None` when this implementation does not know of it.
async fn has_recovery(client: &Client, name: &str) -> Result<Option<bool>, OpenError> {
    let found = match client.describe_continuous_backups().table_name(name).send().await {
        Ok(found) => found,
        Err(error) if error.code() == Some(NO_SUCH_OPERATION) => return Ok(None),
        Err(error) => return Err(failed("describe the backups of", name, &error)),
    };
    let status = found
        .continuous_backups_description
        .and_then(|backups| backups.point_in_time_recovery_description)
        .and_then(|recovery| recovery.point_in_time_recovery_status);
    Ok(Some(status == Some(PointInTimeRecoveryStatus::Enabled)))
}

async fn has_time_to_live(client: &Client, name: &str) -> Result<bool, OpenError> {
    let found = client.describe_time_to_live().table_name(name).send().await;
    let found = found.map_err(|error| failed("describe the time to live of", name, &error))?;
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
    let mut note = |what: String| {
        differences.push(Difference::Other { table: name.to_owned(), what });
    };
    let keys = names_of(found.key_schema());
    if keys != table.key {
        note(format!("its key is {}, should be {}", keys.join(" + "), table.key.join(" + ")));
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
            note(format!("key {attribute} has type {found}, should be {kind}"));
        }
    }
    for index in table.indexes {
        let Some(found) = found_indexes.get(index.name) else {
            note(format!("index {} is not there", index.name));
            continue;
        };
        let (partition, sort, _) = index.key;
        let keys = names_of(found.key_schema());
        if keys != [partition, sort] {
            let keys = keys.join(" + ");
            note(format!("index {} has key {keys}, should be {partition} + {sort}", index.name));
        }
        let projection = found.projection();
        let kind = projection.and_then(|projection| projection.projection_type());
        let mut included: Vec<_> = projection
            .map(|projection| projection.non_key_attributes().to_vec())
            .unwrap_or_default();
        included.sort();
        let as_wanted = match index.projection {
            Projection::KeysOnly => kind == Some(&ProjectionType::KeysOnly),
            Projection::All => kind == Some(&ProjectionType::All),
            Projection::Include(wanted) => {
                let mut wanted = wanted.to_vec();
                wanted.sort_unstable();
                kind == Some(&ProjectionType::Include) && included == wanted
            }
        };
        if !as_wanted {
            let found = kind.map_or("nothing", ProjectionType::as_str);
            note(format!(
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
        note(format!("its stream is {view}, should be NEW_IMAGE"));
    }
    if !has_time_to_live(client, name).await? {
        differences.push(Difference::Other {
            table: name.to_owned(),
            what: format!("its time to live is not attribute {TIME_TO_LIVE}"),
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

/// Partition key first.
fn names_of(schema: &[KeySchemaElement]) -> Vec<&str> {
    let mut elements: Vec<_> = schema.iter().collect();
    elements.sort_by_key(|element| element.key_type() != &KeyType::Hash);
    elements.into_iter().map(KeySchemaElement::attribute_name).collect()
}
