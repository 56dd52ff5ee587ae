package schema

// The types of the resources, as the service declares them in @odata.type: namespace, version, name. Collections have no version.
const (
	TypeServiceRoot    = "ServiceRoot.v1_20_0.ServiceRoot"
	TypeComputerSystem = "ComputerSystem.v1_27_0.ComputerSystem"
	TypeManager        = "Manager.v1_24_0.Manager"
	TypeChassis        = "Chassis.v1_28_0.Chassis"
	TypeLogService     = "LogService.v1_9_0.LogService"
	TypeLogEntry       = "LogEntry.v1_21_0.LogEntry"
	TypeTaskService    = "TaskService.v1_3_0.TaskService"
	TypeTask           = "Task.v1_7_4.Task"
	TypeSessionService = "SessionService.v1_2_0.SessionService"
	TypeSession        = "Session.v1_8_0.Session"
	TypeAccountService = "AccountService.v1_18_1.AccountService"
	TypeManagerAccount = "ManagerAccount.v1_14_1.ManagerAccount"
	TypeRole           = "Role.v1_3_3.Role"
	TypeActionInfo     = "ActionInfo.v1_5_0.ActionInfo"
	TypeRegistryFile   = "MessageRegistryFile.v1_1_5.MessageRegistryFile"
	TypeSchemaFile     = "JsonSchemaFile.v1_1_5.JsonSchemaFile"
	TypeMessage        = "Message.v1_3_0.Message"

	TypeComputerSystemCollection = "ComputerSystemCollection.ComputerSystemCollection"
	TypeManagerCollection        = "ManagerCollection.ManagerCollection"
	TypeChassisCollection        = "ChassisCollection.ChassisCollection"
	TypeLogServiceCollection     = "LogServiceCollection.LogServiceCollection"
	TypeLogEntryCollection       = "LogEntryCollection.LogEntryCollection"
	TypeTaskCollection           = "TaskCollection.TaskCollection"
	TypeSessionCollection        = "SessionCollection.SessionCollection"
	TypeManagerAccountCollection = "ManagerAccountCollection.ManagerAccountCollection"
	TypeRoleCollection           = "RoleCollection.RoleCollection"
	TypeRegistryFileCollection   = "MessageRegistryFileCollection.MessageRegistryFileCollection"
	TypeSchemaFileCollection     = "JsonSchemaFileCollection.JsonSchemaFileCollection"
)
